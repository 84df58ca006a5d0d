"""The command line and the operating system: flags, processes, signals, exit statuses."""
