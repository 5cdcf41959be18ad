"""The command `attrreg bench`: what each way to compute a penalty costs."""
