"""What knows nothing of curvature: files, memory, random state, figures, recorded graphs."""
