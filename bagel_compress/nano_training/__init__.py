"""BAGEL-nano made from its seeds: autoencoder, ViT, understanding, drawing. The world it learns is `bagel.nano`.

Only `train-nano` needs this package: opening, scoring and compressing models never import it.
"""
