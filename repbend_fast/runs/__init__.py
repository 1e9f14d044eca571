"""One run: its folder and log, the data that it trains on and is measured on, and its merged model."""
