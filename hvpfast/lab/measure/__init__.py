"""What is measured: trainings, tunings, times, dense Hessians."""
