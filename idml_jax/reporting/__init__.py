"""What a person looks at: pages, plots, sheets of images."""
