"""What a model shows when it reads text: the statistics that exports are calibrated with."""
