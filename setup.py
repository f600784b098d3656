"""Drives CMake. Never imports torch, never asks whether this machine has a GPU.

Environment: KDK_CUDA=auto|on|off (auto: build the CUDA kernels if nvcc is found through CUDACXX,
CUDA_HOME, PATH or the pip package), KDK_CUDA_ARCHS="80;90a", KDK_SIMT=0|1 (also build the host
emulation of the CUDA kernels), KDK_TESTS=0|1 (C++ self tests), KDK_SANITIZE=0|1, MAX_JOBS.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


def find_nvcc() -> str | None:
    """The path of nvcc, or None."""
    candidates = [os.environ.get("CUDACXX")]
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(variable):
            candidates.append(str(Path(os.environ[variable]) / "bin" / "nvcc"))
    candidates.append(shutil.which("nvcc"))
    candidates += map(str, Path(sysconfig.get_path("purelib")).glob("nvidia/*/bin/nvcc"))
    return next((c for c in candidates if c and Path(c).is_file()), None)


def choose_cuda() -> str | None:
    """The nvcc to build with; None for a CPU-only build."""
    wish = os.environ.get("KDK_CUDA", "auto").lower()
    if wish not in ("auto", "on", "off"):
        raise SystemExit(f"KDK_CUDA: expected auto, on or off, got {wish!r}")
    nvcc = None if wish == "off" else find_nvcc()
    if wish == "on" and nvcc is None:
        raise SystemExit("KDK_CUDA=on, but no nvcc was found (CUDACXX, CUDA_HOME, PATH)")
    return nvcc


class CMakeExtension(Extension):
    def __init__(self, name: str):
        super().__init__(name, sources=[])


class CMakeBuild(build_ext):
    """One CMake project builds every extension module of the package."""

    def run(self) -> None:
        import pybind11

        modules = {e.name: Path(self.get_ext_fullpath(e.name)).resolve() for e in self.extensions}
        build = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        if os.environ.get("KDK_BUILD_DIR"):
            build = Path(os.environ["KDK_BUILD_DIR"]).resolve()
        cmake = shutil.which("cmake")
        if cmake is None:
            raise SystemExit("cmake was not found; it is in build-system.requires")
        nvcc = choose_cuda()

        def switch(name: str) -> str:
            return "ON" if os.environ.get(name, "0") not in ("0", "", "off") else "OFF"

        arguments = [
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DKDK_VERSION={self.distribution.get_version()}",
            f"-DCMAKE_BUILD_TYPE={os.environ.get('KDK_BUILD_TYPE', 'Release')}",
            f"-DKDK_CUDA={'ON' if nvcc else 'OFF'}",
            f"-DKDK_SIMT={switch('KDK_SIMT')}",
            f"-DKDK_BUILD_TESTS={switch('KDK_TESTS')}",
            f"-DKDK_SANITIZE={switch('KDK_SANITIZE')}",
        ]
        if nvcc:
            arguments.append(f"-DCMAKE_CUDA_COMPILER={nvcc}")
            if os.environ.get("KDK_CUDA_ARCHS"):
                arguments.append(f"-DKDK_CUDA_ARCHS={os.environ['KDK_CUDA_ARCHS']}")
        if shutil.which("ninja"):
            arguments += ["-G", "Ninja"]
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        subprocess.run([cmake, "-S", str(ROOT / "csrc"), "-B", str(build), *arguments], check=True)
        subprocess.run([cmake, "--build", str(build), "-j", jobs], check=True)
        for name, target in modules.items():
            built = (
                build / "lib" / (name.rsplit(".", 1)[1] + sysconfig.get_config_var("EXT_SUFFIX"))
            )
            if not built.exists():
                raise SystemExit(f"{name}: the build made no {built.name}")
            target.parent.mkdir(parents=True, exist_ok=True)
            # Write beside and rename: a running process keeps the library that it has mapped.
            beside = target.with_suffix(target.suffix + ".new")
            shutil.copyfile(built, beside)
            os.replace(beside, target)


EXTENSIONS = [CMakeExtension("kdkernels._C")]
if os.environ.get("KDK_SIMT", "0") not in ("0", "", "off"):
    EXTENSIONS.append(CMakeExtension("kdkernels._simt"))

# The benchmarks live at the top level and are installed as kdkernels._bench.
setup(
    packages=[*find_packages(include=["kdkernels", "kdkernels.*"]), "kdkernels._bench"],
    package_dir={"kdkernels._bench": "bench"},
    package_data={"kdkernels._bench": ["*.txt"]},
    ext_modules=EXTENSIONS,
    cmdclass={"build_ext": CMakeBuild},
)
