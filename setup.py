"""Packaging of the PMM toolkit; the metadata is in pyproject.toml."""

from setuptools import find_packages, setup

setup(packages=find_packages(include=["pmm", "pmm.*"]), package_data={"pmm.bench": ["*.html.j2"]})
