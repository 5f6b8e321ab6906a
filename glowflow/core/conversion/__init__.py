"""Weights of other projects: from and to llama2.c's files and Hugging Face's Llama and GPT-2 folders.

Tensors and configs alone; tokenizers are read and written by the data room.
"""
