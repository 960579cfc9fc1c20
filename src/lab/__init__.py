"""What measures the project itself; nothing above imports it."""
