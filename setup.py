"""Static package data: the one place for name, version and dependencies. Tools are configured in pyproject.toml."""

from setuptools import find_packages, setup

setup(
    name="steerfast",
    version="0.2.0",
    description="Fused GPU kernels for steering language models, with a PyTorch reference and a thin hook API",
    license="Apache-2.0",
    license_files=["LICENSE"],
    keywords=["language models", "activation steering", "sparse autoencoders", "triton", "interpretability"],
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3 :: Only",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    python_requires=">=3.10",
    # The folder must never be importable as `kernels`: transformers itself imports a package of that name.
    packages=[*find_packages(include=["steerfast", "steerfast.*"]), "steerfast_kernels"],
    package_dir={"steerfast": "steerfast", "steerfast_kernels": "kernels"},
    package_data={
        "steerfast": ["py.typed", "*.pyi", "probes/*.pyi", "sae/*.pyi", "sae/page.css", "sae/page.js", "tools/*.pyi"],
        "steerfast_kernels": ["README.md"],
    },
    # A CUDA build of torch pins its own triton exactly, so triton is no requirement of ours.
    install_requires=["torch>=2.10", "transformers>=4.57", "safetensors>=0.6", "numpy>=1.26", "tqdm>=4.66"],
    extras_require={
        # Compiles the edits of the PyTorch backend on a CPU.
        "cpu": ["numba>=0.65"],
        "demo": ["accelerate>=1.1", "gguf>=0.17", "scikit-learn>=1.5"],
        "gguf": ["gguf>=0.17"],
        "parquet": ["fsspec>=2024.6", "pyarrow>=17"],
        "sae": ["scikit-learn>=1.5"],
        "bench": ["matplotlib>=3.9", "pytest>=9.0", "pytest-benchmark>=5.0"],
        # Beside a CPU build of torch: for the interpreter and for compiling ahead of time.
        "cpu-kernels": ["triton>=3.6,<3.10"],
        "dev": [
            "build>=1.2",
            "hypothesis>=6.100",
            "kernels>=0.12",  # the package that our folder of that name must not hide
            "mypy>=2.0",
            "numba>=0.65",
            "peft>=0.17",
            "pyarrow>=17",
            "pytest>=9.0",
            "pytest-benchmark>=5.0",
            "pytest-cov>=7.0",
            "pytest-xdist>=3.8",
            "ruff>=0.14",
            "setuptools>=77",
            "torchdiffeq>=0.2.5",
        ],
        "docs": ["pdoc>=16.0"],
    },
    entry_points={
        "console_scripts": ["steerfast=steerfast.cli.main:main"],
        "vllm.general_plugins": ["steerfast=steerfast.vllm:register"],
    },
)
