"""What everything else may use: durable writes, stores, processes, random numbers by counter. Knows no other room."""
