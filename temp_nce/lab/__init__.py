from .experiment import finish_run, open_run
