"""Low rank and tensor decompositions: a weight as a product of smaller ones."""
