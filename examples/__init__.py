"""Other people's models on the pyramid, through the libraries they come with."""
