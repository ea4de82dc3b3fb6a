"Many GPUs, many machines: ranks and launchers, fleet, doctor."
