"""Sizes of layers that kernels are compiled for: rows, width of the model, output width, experts,
tuned experts.
"""

SMALL = (512, 512, 256, 64, 4)
LAYERS = {
    "deepseek-v2-lite up": (24_576, 2048, 2816, 64, 9),
    "deepseek-v2-lite down": (24_576, 1408, 2048, 64, 9),
    "128 experts": (32_768, 2048, 1536, 128, 12),
    "mixtral up": (8192, 4096, 28_672, 8, 1),
    "mixtral down": (8192, 14_336, 4096, 8, 1),
}
