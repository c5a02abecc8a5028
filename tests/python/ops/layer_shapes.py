# Sizes of linear layers that errors and times are taken at.
SHAPES = [  # tokens, in, out, rank: layers of MiniLM, of BERT-base size, and of 1B and 8B models
    (128, 384, 384, 16),
    (512, 384, 384, 16),
    (512, 768, 768, 8),
    (512, 768, 768, 16),
    (512, 768, 768, 64),
    (2048, 768, 768, 16),
    (512, 768, 3072, 16),
    (512, 3072, 768, 16),
    (2048, 2048, 2048, 16),
    (512, 4096, 4096, 16),
]
