"""Linear attention: a recurrent state of constant size in place of the softmax over all earlier positions."""
