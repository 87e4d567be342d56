"""What runs where, and after what: lanes and sinks, the dispatcher, the write guard, deferred updates, host memory."""
