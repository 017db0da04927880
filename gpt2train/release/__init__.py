"""A run → what others can use.

The rooms:

    hf      our parameters ↔ Hugging Face's
    export  a run → a folder that transformers loads; such a folder → a run
    card    the model card
"""
