"""Does it help? Train one model in many ways on a task with a shortcut, and compare them: on the published tasks or on your own data."""
