"""Output for people: pages, plots, contact sheets."""
