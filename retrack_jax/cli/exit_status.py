"""The exit statuses of the command."""

DONE, FAILED, USER_ERROR = 0, 1, 2
PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h: the same command continues
