"""The routes that draw pictures: OpenAI's images API, asynchronous jobs, and Hugging Face's form."""
