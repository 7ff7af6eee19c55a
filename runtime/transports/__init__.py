"""Ways in: MQTT and HTTP. Each turns its protocol into `service` requests and events back."""
