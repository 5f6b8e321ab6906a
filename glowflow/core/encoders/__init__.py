"""Encoders: from prepared pictures and spectrograms to tokens of the model's width."""
