"""Faces to other libraries, each imported by its name: rankwise itself needs none of them."""
