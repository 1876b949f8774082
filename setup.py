"""Python part alone, for use without ROS: training, export and evaluation. The ROS 2 build is CMakeLists.txt."""

from setuptools import setup

setup()
