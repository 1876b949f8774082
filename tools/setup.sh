#!/usr/bin/env bash
# Makes .venv from requirements.lock and builds the package with colcon into install/; skips what is done already.
# GPU=1 installs ONNX Runtime with CUDA (GPU=0 the plain one again), KINETIX=1 the Kinetix benchmark, ROBOT=1 only what a
# robot's own computer runs (ROBOT=0 all); each stays. With a ROS 2 sourced, that one is used; otherwise ROS 2 Kilted
# comes from wheels.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
prefix=$PWD/.venv
if [ -e .venv/.kinetix ]; then KINETIX=1; fi
if [ -e .venv/.gpu ]; then GPU=${GPU:-1}; fi
if [ -e .venv/.robot ]; then ROBOT=${ROBOT:-1}; fi
lock=requirements.lock
if [ "${ROBOT:-0}" = 1 ]; then lock=requirements-robot.lock; fi

say() { printf 'setup: %s\n' "$*"; }
fail() { printf 'setup: %s\n' "$*" >&2; exit 1; }

ros=wheels
if [ -n "${ROS_DISTRO:-}" ] && command -v ros2 >/dev/null; then ros=$ROS_DISTRO; fi

[ "${KINETIX:-0}${ROBOT:-0}" != 11 ] || fail "KINETIX=1 needs what ROBOT=1 leaves out: say ROBOT=0 to install all"
[ "$ros" != wheels ] || [ "$(uname -m)" = x86_64 ] ||
  fail "the wheels of ROS 2 are for x86_64, this machine is $(uname -m): install ROS 2 (Jazzy, Kilted) and source it"

runs_312() { "$1" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' 2>/dev/null; }
makes_venvs() { "$1" -c 'import ensurepip' 2>/dev/null; }
has_headers() {
  "$1" -c 'import os, sysconfig as s, sys; sys.exit(not os.path.isfile(s.get_path("include") + "/Python.h"))' 2>/dev/null
}

# Interpreter of Python 3.12 with all that is needed; nothing if there is none. A python3.12 on PATH can be a shim of a
# version that is not selected, and that of a distribution comes without headers and ensurepip.
find_python() {
  local candidate candidates=(python3.12)
  if [ "$ros" != wheels ]; then
    candidates=(python3)
  elif command -v pyenv >/dev/null; then
    candidates+=("$(pyenv root)"/versions/3.12*/bin/python)
  fi
  for candidate in "${candidates[@]}"; do
    if runs_312 "$candidate" && makes_venvs "$candidate" && has_headers "$candidate"; then
      command -v "$candidate"
      return
    fi
  done
}

system_packages() {
  local wanted=() libraries
  libraries=$(PATH=$PATH:/usr/sbin:/sbin ldconfig -p)
  has_library() { grep -q "$1" <<<"$libraries"; }
  if [ "${ROBOT:-0}${MUJOCO_GL:-osmesa}" = 0osmesa ]; then has_library 'libOSMesa\.so\.8' || wanted+=(libosmesa6); fi
  has_library 'libGL\.so\.1' || wanted+=(libgl1)
  [ "${ROBOT:-0}" = 1 ] || has_library 'libEGL\.so\.1' || wanted+=(libegl1)
  has_library 'libgthread-2\.0\.so\.0' || wanted+=(libglib2.0-0)
  if [ ! -x .venv/bin/uv ] && [ -z "$(find_python)" ]; then
    makes_venvs python3 || wanted+=(python3-venv)
    if runs_312 python3 && ! has_headers python3; then wanted+=(python3-dev); fi
  fi
  if [ "$ros" != wheels ]; then command -v colcon >/dev/null || wanted+=(python3-colcon-common-extensions); fi
  command -v c++ >/dev/null || wanted+=(g++)
  command -v make >/dev/null || wanted+=(make)
  [ ${#wanted[@]} -gt 0 ] || return 0
  if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    say "apt-get install ${wanted[*]}"
    apt-get update -qq
    if [[ " ${wanted[*]} " = *" libosmesa6 "* ]] && ! apt-cache show libosmesa6 >/dev/null 2>&1; then
      fail "this release has no libosmesa6: set MUJOCO_GL=egl; its pictures are not quite those of the results"
    fi
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${wanted[@]}" >/dev/null
  else
    fail "system packages are missing; run: sudo apt-get install ${wanted[*]}"
  fi
}

# The pinned packages, one per line: without ROS where a ROS 2 is sourced, with the CUDA provider for GPU=1, and Kinetix.
requirements() {
  local lines
  lines=$(grep -v '^#' "$lock")
  [ "$ros" = wheels ] || lines=$(grep -vE '^(ros-|colcon-)' <<<"$lines")
  if [ "${GPU:-0}" = 1 ]; then lines=$(grep -v '^onnxruntime==' <<<"$lines"; grep -v '^#' requirements-gpu.lock); fi
  if [ "${KINETIX:-0}" = 1 ]; then lines=$(printf '%s\n' "$lines"; grep -v '^#' requirements-kinetix.lock); fi
  sort -u <<<"$lines"
}

make_venv() {
  local python uv options=()
  uv=$(grep '^uv==' requirements.lock)
  [ "$ros" = wheels ] || options=(--system-site-packages)
  python=$(find_python)
  if [ -n "$python" ]; then
    say "virtual environment of $python"
    "$python" -m venv "${options[@]}" .venv
    .venv/bin/python -m pip install -q --disable-pip-version-check "$uv"
  elif [ "$ros" = wheels ]; then
    say "no Python 3.12 was found, uv downloads one"
    python3 -m venv build/uv
    build/uv/bin/python -m pip install -q "$uv"
    build/uv/bin/uv venv -q --clear --python 3.12 .venv
    build/uv/bin/uv pip install -q --python .venv/bin/python "$uv"
  else
    fail "the Python of ROS 2 $ros is $(python3 --version), allowed is 3.12 (Jazzy, Kilted) with its venv and headers"
  fi
}

install_packages() {
  local rivals=(opencv-python-headless onnxruntime-gpu) owners=(opencv-python onnxruntime) index mirror robosuite
  if [ "${GPU:-0}" = 1 ]; then rivals[1]=onnxruntime owners[1]=onnxruntime-gpu; fi
  for index in 0 1; do
    # Both own the same files: what one of them leaves behind does not work, so both go.
    if .venv/bin/uv pip show -q --python .venv/bin/python "${rivals[index]}" 2>/dev/null; then
      .venv/bin/uv pip uninstall -q --python .venv/bin/python "${rivals[index]}" "${owners[index]}"
    fi
  done
  if [ -z "${UV_DEFAULT_INDEX:-}${UV_INDEX_URL:-}" ]; then # uv does not read pip's configuration
    mirror=$(.venv/bin/python -m pip config get global.index-url 2>/dev/null || true)
    if [ -n "$mirror" ]; then export UV_DEFAULT_INDEX=$mirror; fi
  fi
  say "packages of $lock"
  requirements >.venv/requirements.txt
  # The lock is complete; "sync" would remove the metadata that the ROS wheels carry under second names.
  .venv/bin/uv pip install -q --no-deps --python .venv/bin/python -r .venv/requirements.txt
  .venv/bin/python -c 'import cv2; cv2.imencode'
  # robosuite would log into a file in /tmp that only the first user may write, and could not be imported by others.
  robosuite=$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/robosuite
  [ ! -d "$robosuite" ] ||
    printf 'import robosuite.macros\n\nrobosuite.macros.FILE_LOGGING_LEVEL = None\n' >"$robosuite/macros_private.py"
  if [ "${KINETIX:-0}" = 1 ]; then touch .venv/.kinetix; fi
  if [ "${GPU:-0}" = 1 ]; then touch .venv/.gpu; else rm -f .venv/.gpu; fi
  if [ "${ROBOT:-0}" = 1 ]; then touch .venv/.robot; else rm -f .venv/.robot; fi
}

# The wheels' exported CMake files name the paths of the machine that built them.
repair_cmake_paths() {
  local include site
  include=$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("include"))')
  site=$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
  { grep -rlZ --include='*.cmake' '/opt/python/cp312-cp312' .venv/share || true; } | xargs -0 -r sed -i \
    -e "s|/opt/python/cp312-cp312/include/python3.12|$include|g" \
    -e "s|/opt/python/cp312-cp312/lib/python3.12/site-packages|$site|g"
}

build_package() {
  say "colcon build"
  mkdir -p build
  if [ "$ros" = wheels ]; then export AMENT_PREFIX_PATH=$prefix CMAKE_PREFIX_PATH=$prefix; fi
  if ! VIRTUAL_ENV=$prefix PATH=$prefix/bin:$PATH colcon build --symlink-install --packages-select a2c2_ros \
      --event-handlers console_cohesion- --cmake-args -DBUILD_TESTING=OFF "-DPython3_EXECUTABLE=$prefix/bin/python3" \
      --no-warn-unused-cli >build/colcon.log 2>&1; then
    cat build/colcon.log >&2
    fail "colcon build failed"
  fi
  find install -xtype l -delete  # links to source files that are gone
}

digest() { sha256sum | cut -d' ' -f1; }

# Runs the commands in $3.. unless the stamp file $1 holds $2 already.
unless_done() {
  local stamp=$1 state=$2 step
  shift 2
  [ "$(cat "$stamp" 2>/dev/null || true)" != "$state" ] || return 0
  for step in "$@"; do "$step"; done
  echo "$state" >"$stamp"
}

# What was made for another ROS, or lay in another folder, has its paths in it.
if [ -e .venv/.origin ] && [ "$(cat .venv/.origin)" != "$ros $PWD" ]; then
  say "made before for $(cat .venv/.origin), making it anew"
  rm -rf .venv build install
fi
system_packages
[ -x .venv/bin/uv ] || make_venv
echo "$ros $PWD" >.venv/.origin
unless_done .venv/.packages "$ros $(requirements | digest)" install_packages repair_cmake_paths
# The installation links to the source tree: edits need no build, files that come or go do.
sources=$({ cat CMakeLists.txt package.xml scripts/node.in msg/*.msg srv/*.srv; find a2c2_ros config launch models -type f \
  ! -name '*.pyc' | sort; cat .venv/.packages; echo "$PWD"; } | digest)
unless_done install/.sources "$sources" build_package
say "ready ($ros)"
