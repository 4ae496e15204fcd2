"""What is no test here is run by itself: `make soak`."""

collect_ignore = ["attacks.py", "cases.py", "hostile.py", "soak.py"]
