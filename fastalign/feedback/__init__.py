"""The pieces between the stages of an alignment run, as commands on JSON lines: sample, label, pairs, critique."""
