"""The C library as other programs meet it: its files inside the installed package, a consumer built against them, the C
tests, the header in both languages, and what the library needs and exports.
"""

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

import warpdecode

PACKAGE = Path(warpdecode.__file__).parent
INCLUDE, LIB = PACKAGE / "include", PACKAGE / "lib"
LIBRARY = LIB / "libwarpdecode.so"
TESTS = Path(__file__).parent

WARNINGS = ["-Wall", "-Wextra", "-Wpedantic", "-Werror"]
CONSUMER = """
#include <stdio.h>
#include <warpdecode.h>
int main(void) {
  printf("%s %d\\n", wd_version(), (int)wd_kernel_count());
  return 0;
}
"""


def compiler(variable, *names):
    """A compiler's command, from the environment's variable or the PATH; the test is skipped where there is none."""
    if os.environ.get(variable):
        return shlex.split(os.environ[variable])
    for name in names:
        if shutil.which(name):
            return [name]
    pytest.skip(f"no compiler: neither ${variable} nor {', '.join(names)}")


def tool(name):
    """The tool's path; the test is skipped where it is missing."""
    path = shutil.which(name)
    return path or pytest.skip(f"{name} is not installed")


def run(*command, **options):
    """The command's output; on failure everything it said."""
    both = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    done = subprocess.run([str(part) for part in command], check=False, **both, **options)
    assert done.returncode == 0, f"{command}: exit status {done.returncode}\n{done.stdout}"
    return done.stdout


@pytest.fixture
def consumer(tmp_path):
    """The source of a program that uses the library."""
    source = tmp_path / "consumer.c"
    source.write_text(CONSUMER)
    return source


def check_consumer(output):
    """What the consumer printed is what the binding says."""
    assert output.split() == [warpdecode.version(), str(len(warpdecode.kernels()))]


def test_c_tests_pass_against_the_installed_package(tmp_path):
    program = tmp_path / "test_c_api"
    run(
        *compiler("CC", "cc", "gcc", "clang"),
        *("-std=c11", "-O2", "-D_GNU_SOURCE", *WARNINGS, f"-I{INCLUDE}"),
        *sorted((TESTS / "c").glob("*.c")),
        *(f"-L{LIB}", f"-Wl,-rpath,{LIB}", "-lwarpdecode", "-lm", "-pthread", "-o", program),
    )
    last = run(program, timeout=600).splitlines()[-1]
    assert re.fullmatch(r"[1-9]\d* passed, 0 failed", last)


def test_pkg_config_builds_a_consumer(consumer):
    environment = {**os.environ, "PKG_CONFIG_PATH": str(LIB / "pkgconfig")}
    pkg_config = tool("pkg-config")
    flags = shlex.split(run(pkg_config, "--cflags", "--libs", "warpdecode", env=environment))
    assert run(pkg_config, "--modversion", "warpdecode", env=environment).strip() == warpdecode.version()
    # The prefix is found from where the file lies, so the flags lead into this package wherever it is installed.
    folders = [Path(flag[2:]).resolve() for flag in flags if flag[:2] in ("-I", "-L")]
    assert folders == [INCLUDE.resolve(), LIB.resolve()]
    program = consumer.with_suffix("")
    command = [*compiler("CC", "cc", "gcc", "clang"), "-std=c11", *WARNINGS, consumer, *flags]
    run(*command, f"-Wl,-rpath,{LIB}", "-o", program)
    check_consumer(run(program))


@pytest.mark.parametrize("libdir", ["lib64", "lib/x86_64-linux-gnu"])
def test_pkg_config_finds_its_way_from_any_libdir(libdir, tmp_path):
    """Distributions call it otherwise. And what -D says holds, whatever the environment does."""
    cmake, pkg_config, build = tool("cmake"), tool("pkg-config"), tmp_path / "build"
    compiler("CC", "cc", "gcc", "clang")
    environment = {**os.environ, "WARPDECODE_CUDA": "nonsense"}
    options = {"CMAKE_INSTALL_PREFIX": "/usr", "CMAKE_INSTALL_LIBDIR": libdir, "WARPDECODE_CUDA": "off"}
    flags = [f"-D{name}={value}" for name, value in {**options, "DLPACK_INCLUDE_DIR": INCLUDE}.items()]
    run(cmake, "-S", TESTS.parent, "-B", build, *flags, env=environment)
    installed = tmp_path / "usr" / libdir / "pkgconfig"
    installed.mkdir(parents=True)
    shutil.copy(build / "warpdecode.pc", installed)
    environment["PKG_CONFIG_PATH"] = str(installed)
    flags = shlex.split(run(pkg_config, "--cflags", "--libs", "warpdecode", env=environment))
    folders = [Path(flag[2:]).resolve() for flag in flags if flag[:2] in ("-I", "-L")]
    assert folders == [tmp_path / "usr" / "include", tmp_path / "usr" / libdir]


def test_cmake_package_builds_a_consumer(consumer):
    cmake = tool("cmake")
    compiler("CC", "cc", "gcc", "clang")
    (consumer.parent / "CMakeLists.txt").write_text(f"""
cmake_minimum_required(VERSION 3.21)
project(consumer LANGUAGES C)
find_package(warpdecode {warpdecode.version()} REQUIRED)
add_executable(consumer consumer.c)
target_link_libraries(consumer PRIVATE warpdecode::warpdecode)
""")
    build = consumer.parent / "build"
    run(cmake, "-S", consumer.parent, "-B", build, f"-Dwarpdecode_ROOT={PACKAGE}")
    run(cmake, "--build", build)
    check_consumer(run(build / "consumer"))


@pytest.mark.parametrize(
    ("variable", "names", "language", "standard"),
    [("CC", ("cc", "gcc", "clang"), "c", "c11"), ("CXX", ("c++", "g++", "clang++"), "c++", "c++17")],
    ids=["C11", "C++17"],
)
def test_the_header_stands_alone(tmp_path, variable, names, language, standard):
    source = tmp_path / "header"
    # Twice, for its guard; not as the main file, whose pedantry differs.
    include = "#include <warpdecode.h>\n"
    source.write_text(include + include + "int main(void) { return wd_kernel_count() < 0; }\n")
    program = tmp_path / "program"
    command = [*compiler(variable, *names), "-x", language, f"-std={standard}", *WARNINGS, f"-I{INCLUDE}", source]
    run(*command, "-x", "none", f"-L{LIB}", f"-Wl,-rpath,{LIB}", "-lwarpdecode", "-o", program)
    run(program)  # found by its name in both languages: extern "C"


def test_the_library_needs_the_c_library_alone():
    if shutil.which("readelf"):
        needed = re.findall(r"\(NEEDED\).*\[(.*)\]", run("readelf", "-d", "-W", LIBRARY))
    else:
        lines = run(tool("ldd"), LIBRARY).splitlines()
        needed = [Path(line.split()[0]).name for line in lines if "vdso" not in line]
    assert needed
    # Until glibc 2.34 its threads, dlopen (the CUDA runtime's way to the driver) and clocks were files of their own.
    glibc = r"lib(c|m|pthread|dl|rt)\.so\.\d+|ld-linux[-\w]*\.so\.\d+"
    assert [name for name in needed if not re.fullmatch(glibc, name)] == []


def declared_functions():
    """The functions that the installed header declares."""
    return sorted(re.findall(r"^WD_API [^;(]*?(wd_\w+)\(", (INCLUDE / "warpdecode.h").read_text(), re.MULTILINE))


def test_the_symbols_are_the_headers_functions():
    """The list that is kept, the header and the library say the same."""
    assert (TESTS / "exported_symbols.txt").read_text().split() == declared_functions()
    tool("nm")
    run(TESTS.parent / ".ci" / "check_symbols.sh", LIBRARY)
