"""What happens, in what order. Knows the stages and no library behind them."""
