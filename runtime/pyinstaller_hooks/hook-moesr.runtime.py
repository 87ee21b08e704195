"""The data files, the metadata and the modules imported by name of `moesr.runtime`, for PyInstaller."""

from contextlib import suppress
from importlib.metadata import PackageNotFoundError

from PyInstaller.utils.hooks import (  # pyright: ignore[reportMissingImports, reportMissingModuleSource]
    collect_data_files,
    collect_submodules,
    copy_metadata,
)

hiddenimports = collect_submodules("moesr.runtime", filter=lambda name: "pyinstaller_hooks" not in name)
datas = collect_data_files("moesr.runtime")
with suppress(PackageNotFoundError):  # a copy of the sources has no metadata
    datas += copy_metadata("moesr")
