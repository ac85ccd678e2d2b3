"""MIL, the program inside an `.mlpackage`: loaded and executed with torch on any machine."""
