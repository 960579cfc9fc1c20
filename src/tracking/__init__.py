"""Mirrors run folders into MLflow. The run folder is the source of truth."""
