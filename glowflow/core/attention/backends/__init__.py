"""The kernels behind softmax attention, one file each."""
