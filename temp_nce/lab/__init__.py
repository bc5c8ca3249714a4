from temp_nce.lab.experiment import finish_run, open_run
