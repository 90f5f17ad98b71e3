from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="megarq",
    version="0.1.0",
    description="Large-scale training of residual-quantized text-to-image models (RQ-VAE + RQ-Transformer)",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["megarq", "megarq.*"]),
    install_requires=[
        "torch>=2.11",
        "torchvision>=0.26",
        "deepspeed>=0.19",
        "braceexpand",
        "numpy",
        "omegaconf>=2.3",
        "pillow",
        "PyYAML",
        "safetensors",
        "sentencepiece",
        "tensorboard",
        "tokenizers",
        "tqdm",
        "webdataset",
    ],
    extras_require={
        "eval": ["torch-fidelity>=0.3", "scipy"],
        "demo": ["scikit-learn", "matplotlib"],
        "dev": [
            "allpairspy",
            "import-linter",
            "mypy",
            "pytest",
            "pytest-timeout",
            "ruff",
            "types-PyYAML",
            "types-tqdm",
        ],
        "mpi": ["mpi4py", "mpich"],
    },
)
