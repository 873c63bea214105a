"""What pyproject.toml cannot say: `configs/` is installed inside the package, so that its files are found by name."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["dspark_jax*"]), "dspark_jax.configs"],
    package_dir={"dspark_jax.configs": "configs"},
)
