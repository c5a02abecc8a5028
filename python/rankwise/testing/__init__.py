"""For tests of other libraries with our layers in place."""
