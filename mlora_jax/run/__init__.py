"""An experiment from its config to its report: inputs, stages, read-outs and the folder of a run."""
