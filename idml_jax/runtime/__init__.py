"""Effects that every upper floor uses: devices, hosts, signals, checkpoints, metric writers."""
