# Source this file in bash: the environment of the nodes, tests and tools. What is set already is kept.
_root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
_install=$_root/install/a2c2_ros
export VIRTUAL_ENV=$_root/.venv
export PATH=$VIRTUAL_ENV/bin:$PATH

_ros=wheels
if [ -r "$VIRTUAL_ENV/.packages" ]; then read -r _ros _ <"$VIRTUAL_ENV/.packages"; fi # what setup.sh built with
if [ "$_ros" = wheels ]; then
  export AMENT_PREFIX_PATH=$VIRTUAL_ENV RMW_IMPLEMENTATION=rmw_fastrtps_cpp
fi
export AMENT_PREFIX_PATH=$_install${AMENT_PREFIX_PATH:+:$AMENT_PREFIX_PATH}
export LD_LIBRARY_PATH=$_install/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
export PYTHONPATH=$_install/lib/python3.12/site-packages${PYTHONPATH:+:$PYTHONPATH}
unset PYTHONDONTWRITEBYTECODE # every process would compile thousands of modules again
export PYTHONSAFEPATH=1 # the folder a2c2_ros of the source tree has no a2c2_ros.msg and must not come first

export ROS_AUTOMATIC_DISCOVERY_RANGE=${ROS_AUTOMATIC_DISCOVERY_RANGE:-LOCALHOST} # other machines only on purpose
export MUJOCO_GL=${MUJOCO_GL:-osmesa}
export HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1}
unset _root _install _ros
