"""Packaging: distribution ``repbend-fast``, import package ``repbend_fast``. The ops are a distribution of their own
(``kernels/``).
"""

import os
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
KERNELS = ROOT / "kernels"
# In a clone the ops beside this file are the ones that fit, so `pip install .` brings them; a source distribution has
# no clone, and a wheel to hand on (`make wheels`) must name no folder of the machine that it was built on.
BESIDE = KERNELS.is_dir() and not os.environ.get("REPBEND_RELEASE")
KERNELS_REQUIREMENT = f"repbend-kernels @ {KERNELS.resolve().as_uri()}" if BESIDE else "repbend-kernels==0.1.0"

setup(
    name="repbend-fast",
    version="0.1.0",
    description="Representation Bending (RepBend) safety training of 1B to 8B chat models on one consumer GPU",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=[
        *find_packages(str(ROOT), include=["repbend_fast", "repbend_fast.*"]),
        "repbend_fast.recipes",
    ],
    package_dir={"repbend_fast": "repbend_fast", "repbend_fast.recipes": "recipes"},
    package_data={
        "repbend_fast.recipes": ["*.yaml", "overlays/*.yaml", "policies/*.yaml"],
        "repbend_fast.data.demo": ["*.json", "*.jsonl"],
        "repbend_fast.making": ["*.json"],
        "repbend_fast.report": ["*.html.j2", "*.css", "*.js"],
    },
    install_requires=[
        KERNELS_REQUIREMENT,
        "torch>=2.11",
        "triton>=3.6; platform_system == 'Linux' and platform_machine == 'x86_64'",
        "transformers>=5.17,<6",
        "peft>=0.21,<1",
        "accelerate>=1.10",
        "bitsandbytes>=0.50",
        "safetensors>=0.5",
        "pydantic>=2.10,<3",
        "PyYAML>=6",
        "rich>=13",
        "matplotlib>=3.9",
        "jinja2>=3.1",
        "datasets>=4",
        "gguf>=0.17",
        "numpy>=2",
        "httpx2>=2,<3",
    ],
    extras_require={
        "lm-eval": ["lm-eval>=0.4.13"],
        "tensorboard": ["tensorboard>=2.18"],
        "wandb": ["wandb>=0.19"],
        "trackio": ["trackio>=0.2"],
        "liger": ["liger-kernel>=0.8; platform_system == 'Linux'"],
        "docs": ["mkdocs>=1.6,<2", "mkdocs-material>=9.6,<10", "latex2mathml>=3.77"],
        "dev": [
            "pytest>=8",
            "pytest-benchmark>=5",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.6",
            "hypothesis>=6.100",
            "ruff>=0.15",
            "mypy>=1.15",
            "types-PyYAML",
            "liger-kernel>=0.8; platform_system == 'Linux'",
        ],
    },
    entry_points={"console_scripts": ["repbend-fast = repbend_fast.cli:main"]},
)
