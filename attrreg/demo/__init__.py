"""The demo: train one small model plainly and with each kind of regularizer on a task with a shortcut."""
