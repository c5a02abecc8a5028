# make gpu: builds for the GPU at hand, tests and checks memory there, and measures.
