"""Build the `_kvkernels` extension with CMake; everything else is in pyproject.toml."""

import subprocess
import sys
from pathlib import Path

import cmake
import ninja
import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CMAKE = str(Path(cmake.CMAKE_BIN_DIR) / "cmake")


class CMakeBuild(build_ext):
    """Hands the extension to CMake and puts the result where setuptools expects it."""

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build_dir = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        # Every path is given anew: a build folder may outlive the environment it was made in.
        options = {
            "CMAKE_BUILD_TYPE": "Release",
            "CMAKE_LIBRARY_OUTPUT_DIRECTORY": target.parent,
            "CMAKE_MAKE_PROGRAM": Path(ninja.BIN_DIR) / "ninja",
            "KVKERNELS_EXTENSION": "ON",
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
        }
        definitions = [f"-D{name}={value}" for name, value in options.items()]
        subprocess.run(
            [CMAKE, "-S", ROOT, "-B", build_dir, "-G", "Ninja", *definitions], check=True
        )
        subprocess.run([CMAKE, "--build", build_dir], check=True)


setup(ext_modules=[Extension("_kvkernels", sources=[])], cmdclass={"build_ext": CMakeBuild})
