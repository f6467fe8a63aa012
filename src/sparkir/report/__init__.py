"""Tables, pictures and the event stream."""
