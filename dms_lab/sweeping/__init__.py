"""Many points as one sweep: expanded, submitted, watched and collected. The folders of their runs are the truth."""
